"""Questions put to several trainings at once: which cell, which remedy."""
