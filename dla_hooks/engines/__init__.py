"""The verb on engines that others run: Ray Data, datasets, accelerate, job arrays."""
