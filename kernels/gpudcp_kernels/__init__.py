"""The GPU kernels of gpudcp: cast, pack, unpack, checksum. Knows pointers, sizes and dtypes; never imports gpudcp."""
