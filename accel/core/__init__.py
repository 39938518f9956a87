"""How tokens travel (plan, site, span, keys and values) and when (clock, schedule, run): what all methods share."""
