"""Arrays and where their voxels are: affines, resampling, intensities. No files."""
