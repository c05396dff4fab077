"""Router tuning (RoMA): trains only the routers. They learn to route a sample like similar samples with right answers."""
