"""Pictures of volumes: planes, panels, maps of errors."""
