"""What references could give at most: a fuser fitted on other seeds (`training.fusion`)."""
