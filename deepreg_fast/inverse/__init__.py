"""The inverse problem: data term, measurements, recovery and hypergradient."""
