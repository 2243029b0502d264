"""The networks: layers, forms, weights in every file format, snapshots."""
