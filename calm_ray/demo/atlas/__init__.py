"""The atlas: a small public model and facts about the countries of the world, without a download at run time."""
