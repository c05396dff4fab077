"""Maps experts to ranks and determines the roles of parameters. Imports no torch."""
