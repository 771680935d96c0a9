"""A project with an image of its own on a real engine."""

from support.docker_hosts import project as project
from support.docker_hosts import real as real
