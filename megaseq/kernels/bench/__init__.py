"""What stands behind `megaseq bench kernels`: proof of the kernels on a GPU, their times, and the choice of tiles."""
