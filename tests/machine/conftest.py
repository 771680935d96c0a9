"""A project's folder for Docker's host."""

from support.docker_hosts import project as project
