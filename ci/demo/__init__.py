"""The demonstration: a job under checkpoints whose node is killed ends elsewhere, with the right result."""
