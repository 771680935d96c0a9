"""Small computations that show whether the libraries compute correctly on a device.

Each returns its distance from the same arithmetic in fp32, on the CPU unless stated otherwise: the largest difference
divided by the largest value, so 0 is equal and 1 is noise.
"""
