"""Makes facts (questions with answers) from WordNet, from the quiz files of bsdgames, and with reasoning-gym."""
