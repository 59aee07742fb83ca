from tests.distributed.fixtures import arguments, home

__all__ = ["arguments", "home"]
