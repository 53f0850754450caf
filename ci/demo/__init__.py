"""The demonstration: a job under checkpoints whose node is killed, and who ends elsewhere as if nothing had been."""
