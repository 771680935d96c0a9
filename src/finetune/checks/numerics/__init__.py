"""Small computations that show whether the libraries compute what they should on a device.

Each returns how far the result is from the same arithmetic in fp32 on the CPU, or on the device where that is said: the
largest difference divided by the largest value, so 0 is equal and 1 is noise.
"""
