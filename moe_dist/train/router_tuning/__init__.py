"""Router tuning (RoMA): the routers alone are trained, towards the routing of neighbours that did better."""
