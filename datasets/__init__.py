"""The embedded sets: base arrays, the programs that built them, and those that make feature files of them."""
