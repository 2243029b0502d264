"""The whole job on brains made of a real template that needs no download."""
