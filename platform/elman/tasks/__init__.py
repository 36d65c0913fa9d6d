"""What a model is trained to do, and how it is judged."""
