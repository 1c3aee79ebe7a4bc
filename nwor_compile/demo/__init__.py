"""The demo behind `nwor demo`: speculative decoding of real text through a compiled model."""
