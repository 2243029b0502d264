"""The paper's studies on a user's own images and models."""
