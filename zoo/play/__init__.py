"""A person inside the dream of a model; see `zoo play`."""
