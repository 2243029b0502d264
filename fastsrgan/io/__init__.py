"""Images, tables and datasets in files."""
