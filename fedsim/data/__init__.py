"""Examples and who holds them: datasets, the places their files come from, and how they are split over clients."""
