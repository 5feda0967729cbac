"""A node's state, its fitness and the faults on it change in checked steps."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from rocket.cluster.binaries import Binaries, Installation
from rocket.cluster.errors import CommandFailed, NodeFrozen, NodeNotRunning, ServerFailedToStart
from rocket.cluster.faults import NODE_COMMANDS
from rocket.cluster.node import Fault, Node, NodeState
from rocket.cluster.rejoin import rejoin
from rocket.cluster.supervisor import local_cluster
from tests.support.clusters import settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from rocket.cluster.cluster import LocalCluster

(
    STOPPED, STARTING, RECOVERING, UP, STOPPING, RESTARTING, TRIMMING, REWINDING, CLONING, GIVEN_UP,
) = NodeState  # fmt: skip


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """A node that nothing runs on."""
    return Node("replica0", tmp_path / "replica0", 1, Installation(Binaries(tmp_path, 18), None, tmp_path))


@pytest_asyncio.fixture
async def small() -> AsyncIterator[LocalCluster]:
    """A cluster without a supervisor."""
    async with local_cluster(settings()) as cluster:
        yield cluster


def test_a_new_node_is_stopped_and_fit(node: Node) -> None:
    """No fault is in force on it."""
    assert (STOPPED, False, False, False, frozenset()) == (
        node.state,
        node.wanted,
        node.suspect,
        node.up.is_set(),
        node.faults,
    )


@pytest.mark.parametrize("state", [UP, STOPPING, STOPPED, RESTARTING])
def test_a_node_that_is_down_enters_no_state_of_a_running_one(node: Node, state: NodeState) -> None:
    """It has to be started first; and it is not set to be down, but found to be."""
    with pytest.raises(RuntimeError, match=f"replica0 cannot become {state} while it is stopped"):
        node.enter(state)
    assert STOPPED is node.state


@pytest.mark.parametrize(
    ("first", "then", "allowed"),
    [
        (TRIMMING, CLONING, True),
        (REWINDING, CLONING, True),
        (CLONING, TRIMMING, False),
        (TRIMMING, REWINDING, False),
        (TRIMMING, UP, False),
        (CLONING, STARTING, False),
    ],
)
async def test_a_remedy_that_fails_is_followed_by_a_fresh_copy_alone(
    node: Node, first: NodeState, then: NodeState, *, allowed: bool
) -> None:
    """And a node that rejoins is not started meanwhile."""
    async with node.held():
        node.enter(first)
        if allowed:
            node.enter(then)
        else:
            with pytest.raises(RuntimeError):
                node.enter(then)
        assert (then if allowed else first) is node.state
    assert STOPPED is node.state


async def test_a_server_goes_from_state_to_state(small: LocalCluster) -> None:
    """It is up from its first answer until it is stopped, crashes, or is fenced."""
    node = small.node("replica0")
    assert (UP, True) == (node.state, node.up.is_set())
    for forbidden in (STARTING, TRIMMING, REWINDING, CLONING):
        with pytest.raises(RuntimeError):
            node.enter(forbidden)
    stopping = asyncio.create_task(node.stop(), name="stop")
    await asyncio.sleep(0)
    assert (STOPPING, False, False) == (node.state, node.up.is_set(), node.wanted)
    await stopping
    assert STOPPED is node.state
    starting = asyncio.create_task(node.start(small.primary.port), name="start")
    async with asyncio.timeout(10):
        while node.state is not STARTING:
            assert node.state in {STOPPED, RESTARTING}
            await asyncio.sleep(0)
    await starting
    assert UP is node.state
    node.kill()
    assert node.process is not None
    await node.process.wait()
    assert RESTARTING is node.state  # whether it was noticed or not
    assert await node.start_again(small.primary.port)
    await node.fence()
    assert (RESTARTING, True) == (node.state, node.suspect)


async def test_a_suspect_node_is_not_started_before_it_has_rejoined(small: LocalCluster) -> None:
    """Nor does a node forget that only a fresh copy will do."""
    node = small.node("replica0")
    node.distrust(unfit=True)
    node.distrust()
    assert node.unfit
    await node.stop()
    assert not await node.start_again(small.primary.port)
    with pytest.raises(ServerFailedToStart, match="has to rejoin"):
        await node.start(small.primary.port)
    await small.primary.stop()
    with pytest.raises(CommandFailed, match="primary does not answer"):
        await rejoin(small, node)
    assert (STOPPED, True) == (node.state, node.unfit)
    await small.primary.start(small.primary.port)
    await rejoin(small, node)
    assert (STOPPED, False, False, 1) == (node.state, node.suspect, node.unfit, node.rejoined_on)
    await node.start(small.primary.port)
    await small.wait_for_catchup()


@pytest.mark.parametrize("fault", [Fault.FROZEN, Fault.STARTUP_HALTED, Fault.WALRECEIVER_HALTED])
def test_what_halts_processes_needs_a_running_server(node: Node, fault: Fault) -> None:
    """What is in the configuration does not."""
    with pytest.raises(NodeNotRunning):
        node.impose(fault)
    node.impose(Fault.CUT)
    node.impose(Fault.DELAYED, 7)
    assert (True, 7, {Fault.CUT, Fault.DELAYED}) == (node.cut, node.apply_delay_ms, set(node.faults))
    node.impose(Fault.DELAYED, 0)
    assert (0, {Fault.CUT}) == (node.apply_delay_ms, set(node.faults))
    assert (True, None) == (node.lift(Fault.CUT), node.lift(Fault.CUT))
    assert not node.faults


async def test_faults_of_the_process_end_with_it_and_those_in_the_configuration_stay(small: LocalCluster) -> None:
    """However it ends: here by a signal that the node knows nothing of."""
    node = small.node("replica0")
    node.impose(Fault.CUT)
    node.impose(Fault.WALRECEIVER_HALTED, object())
    with pytest.raises(NodeFrozen):
        node.impose(Fault.WALRECEIVER_HALTED, object())
    node.freeze()
    assert ("frozen", True, UP) == (node.describe_state(), node.halted, node.state)
    process = node.process
    assert process is not None
    process.send_all(signal.SIGKILL)
    await node.died()
    assert ({Fault.CUT}, "restarting") == (set(node.faults), node.describe_state())
    assert await node.start_again(small.primary.port)
    assert {Fault.CUT} == node.faults


def test_every_fault_of_the_table_is_undone_by_a_command_of_it() -> None:
    """What lasts beyond a restart cannot be over by itself; a flag belongs to a command."""
    for command in NODE_COMMANDS.values():
        assert command.undone_by is None or command.undone_by in NODE_COMMANDS
        assert command.undone_by or not command.lasts
        assert command.flag_of is None or command.name.startswith(f"{command.flag_of}-")
