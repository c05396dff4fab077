"""Facts of WordNet, of the quiz files of bsdgames, and of reasoning-gym."""
