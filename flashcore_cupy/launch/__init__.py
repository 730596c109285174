"""How a kernel is started: parameters, tensor maps, workspace, the launch cache."""
