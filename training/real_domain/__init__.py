"""The shipped domain model for real pictures: how it is fitted, judged and written."""
