"""Router tuning (RoMA): trains only the routers, towards the routing of successful neighbours."""
