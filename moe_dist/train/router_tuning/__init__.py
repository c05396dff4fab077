"""Router tuning (RoMA): trains only the routers, so that they route a sample like similar samples that the model answered
right."""
