"""Where chunks lie: byte ranges of files, cut into slabs. Values only: no tensor, no handle, no I/O, no clock."""
