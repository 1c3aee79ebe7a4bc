"""nwor_compile."""
