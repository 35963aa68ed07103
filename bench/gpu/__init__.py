"""All measurements on a GPU, in one run of several processes."""
