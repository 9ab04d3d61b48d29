"""From an activation to scalars: directions, tiles of positions, contractions, ledgers."""
