"""Router tuning (RoMA): trains only the routers, to route a sample like similar samples that the model answered right."""
