"""The whole job on real data that needs no download."""
