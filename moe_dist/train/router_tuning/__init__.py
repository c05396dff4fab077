"""Router tuning (RoMA): trains only the routers, to route a sample like similar samples that were answered right."""
