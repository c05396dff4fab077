"""Router tuning (RoMA): trains only the routers. They learn to route a sample as they route similar samples that the model
answered correctly."""
