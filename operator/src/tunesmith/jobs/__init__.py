"""Jobs of the trainer's image: their pods, their observed state and their outcomes."""
