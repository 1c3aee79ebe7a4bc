"""Triton launchers of the ops, one module an op; imported when a kernel is first needed.

A launcher takes the arguments of the reference of the same name, already checked, launches one
kernel (split attention: a second one that reduces), never synchronises with the device, and
allocates outputs and workspace only, so that a CUDA graph can record it. Everything that depends
on the data is decided on the device; grids depend on shapes.
"""
