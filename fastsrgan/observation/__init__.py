"""How a scan comes from an image (paper eq. 1), and what clinical scans add."""
