"""Router tuning (RoMA, arXiv 2511.07419): scored samples, their neighbours, and the loss that aligns their routing."""
