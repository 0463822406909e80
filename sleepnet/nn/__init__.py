"""The network: blocks, the model that stacks them, its cost, and parameters split over devices."""
