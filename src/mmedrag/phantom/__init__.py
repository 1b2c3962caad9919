"""A controllable three-domain benchmark: images, reports, questions and exact ground truth."""
