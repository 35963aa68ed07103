"""The host side of generation: requests, page allocation, scheduling, and the loop that drives the device."""
