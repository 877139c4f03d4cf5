//! What the core does in the plain and the awkward cases, one sentence each.

mod common;

use std::collections::BTreeSet;

use common::{World, assignment, copy, id};
use towline_node_core::{Assignment, Effect, Failure, Gate, Input};
use towline_proto::v1::{Desired, Phase, exit_status};

fn running() -> World {
    let mut world = World::new();
    world.connect();
    world.want(assignment(1, 1, 1, Desired::Running));
    world.bookmark();
    world.settle();
    assert_eq!(world.phase(1), Some(Phase::Running));
    world
}

#[test]
fn nothing_is_begun_before_the_record_is_on_disk() {
    let mut world = World::new();
    world.connect();
    world.want(assignment(1, 1, 1, Desired::Running));
    assert!(matches!(world.waiting[..], [Effect::Persist { .. }]), "{:?}", world.waiting);
    assert_eq!(world.core.observed(id(1)), None);
    world.answer(0, false);
    world.settle();
    assert_eq!(world.phase(1), Some(Phase::Failed));
    assert!(world.reason(1).contains("no space"), "{}", world.reason(1));
}

#[test]
fn streams_are_let_in_only_between_the_probe_and_the_stop() {
    let mut world = running();
    assert_eq!(world.gates[&id(1)], Gate::Open { epoch: 1 });
    world.want(assignment(1, 1, 2, Desired::Stopped));
    assert!(matches!(world.gates[&id(1)], Gate::Closing { .. }));
    world.settle();
    assert!(matches!(world.gates[&id(1)], Gate::Shut { .. }));
    assert_eq!(world.phase(1), Some(Phase::Stopped));
    assert!(world.disk.contains_key(&id(1)));
    world.want(assignment(1, 1, 3, Desired::Running));
    world.settle();
    assert_eq!(world.phase(1), Some(Phase::Running));
    assert_eq!(world.committed[&id(1)].generation, 3);
}

#[test]
fn a_deleted_sandbox_is_gone_and_forgotten_once_that_is_committed() {
    let mut world = running();
    world.want(assignment(1, 1, 2, Desired::Deleted));
    world.settle();
    assert_eq!(world.phase(1), Some(Phase::Gone));
    assert_eq!(world.core.sandboxes().count(), 0);
    // A member that is behind cannot bring it back.
    world.want(assignment(1, 1, 1, Desired::Running));
    assert!(world.waiting.is_empty(), "{:?}", world.waiting);
}

#[test]
fn a_sandbox_that_never_was_here_is_reported_gone_when_it_should_go() {
    let mut world = World::new();
    world.connect();
    world.want(assignment(1, 1, 2, Desired::Deleted));
    world.settle();
    assert_eq!(world.phase(1), Some(Phase::Gone));
}

#[test]
fn older_records_and_older_sessions_change_nothing() {
    let mut world = running();
    let old = world.session;
    let before = world.core.observed(id(1));
    world.want(assignment(1, 0, 9, Desired::Deleted));
    world.want(assignment(1, 1, 0, Desired::Deleted));
    world.want(assignment(1, 1, 1, Desired::Running));
    assert_eq!(world.core.observed(id(1)), before);
    world.cut();
    world.connect();
    let late = Box::new(assignment(1, 1, 2, Desired::Deleted));
    world.input(Input::Desired { session: old, assignment: late });
    world.input(Input::Bookmark { session: old, revision: 7 });
    assert_eq!(world.core.observed(id(1)), before);
}

#[test]
fn what_the_full_set_does_not_name_is_destroyed_and_not_reported() {
    let mut world = running();
    world.want(assignment(2, 1, 1, Desired::Running));
    world.settle();
    world.cut();
    world.connect();
    world.want(assignment(2, 1, 1, Desired::Running));
    world.settle();
    assert_eq!(world.core.sandboxes().count(), 2);
    world.bookmark();
    world.settle();
    assert_eq!(world.core.sandboxes().collect::<Vec<_>>(), [id(2)]);
    assert_eq!(world.phase(1), Some(Phase::Running), "its record is not ours to change");
    assert!(!world.disk.contains_key(&id(1)));
}

#[test]
fn what_was_not_acknowledged_is_told_again_after_a_cut() {
    let mut world = World::new();
    world.connect();
    world.want(assignment(1, 1, 1, Desired::Running));
    world.answer(0, true);
    let report = world.find(|effect| matches!(effect, Effect::Report { .. }));
    world.answer(report, false);
    world.settle();
    assert_eq!(world.phase(1), None);
    world.connect();
    world.settle();
    assert_eq!(world.phase(1), Some(Phase::Running));
}

#[test]
fn one_report_is_under_way_and_the_rest_coalesce() {
    let mut world = World::new();
    world.connect();
    world.want(assignment(1, 1, 1, Desired::Running));
    while world.waiting.iter().any(|effect| !matches!(effect, Effect::Report { .. })) {
        let next = world.find(|effect| !matches!(effect, Effect::Report { .. }));
        world.answer(next, true);
    }
    assert_eq!(world.waiting.len(), 1, "{:?}", world.waiting);
    world.settle();
    assert_eq!(world.reports, 2, "preparing, then running with all between left out");
}

#[test]
fn a_vm_that_ends_by_itself_is_stopped_and_only_a_newer_record_starts_it() {
    let mut world = running();
    let run = world.core.run(id(1)).unwrap();
    world.alive.clear();
    let reason = "QEMU was killed by signal 9".to_owned();
    world.input(Input::VmExited { sandbox: id(1), run, reason });
    world.settle();
    assert_eq!(world.phase(1), Some(Phase::Stopped));
    assert!(world.reason(1).contains("signal 9"));
    world.want(assignment(1, 1, 1, Desired::Running));
    world.settle();
    assert_eq!(world.phase(1), Some(Phase::Stopped));
    world.want(assignment(1, 1, 2, Desired::Running));
    world.settle();
    assert_eq!(world.phase(1), Some(Phase::Running));
}

#[test]
fn passing_failures_are_tried_again_a_bounded_number_of_times() {
    let mut world = World::new();
    world.connect();
    world.want(assignment(1, 1, 1, Desired::Running));
    let mut prepared = 0;
    for _ in 0..40 {
        match world.waiting.iter().position(|effect| matches!(effect, Effect::Prepare { .. })) {
            Some(index) => {
                prepared += 1;
                world.answer(index, false);
            }
            None if !world.waiting.is_empty() => world.answer(0, true),
            None => {
                let Some(deadline) = world.core.next_deadline() else { break };
                world.now = deadline;
                world.input(Input::Tick);
            }
        }
    }
    assert_eq!(prepared, 3);
    assert_eq!(world.phase(1), Some(Phase::Failed));
    assert_eq!(world.reason(1), "broken");
}

#[test]
fn a_lasting_failure_is_not_tried_again() {
    let mut world = World::new();
    world.connect();
    world.want(assignment(1, 1, 1, Desired::Running));
    world.answer(0, true);
    let run = world.core.run(id(1)).unwrap();
    let failure = Failure { reason: "unknown image `nope`".into(), transient: false };
    world.waiting.retain(|effect| !matches!(effect, Effect::Prepare { .. }));
    world.input(Input::PrepareFailed { sandbox: id(1), run, failure });
    world.settle();
    assert_eq!((world.phase(1), world.reason(1)), (Some(Phase::Failed), "unknown image `nope`"));
}

#[test]
fn a_boot_without_an_end_is_killed_at_its_deadline() {
    let mut world = World::new();
    world.connect();
    world.want(assignment(1, 1, 1, Desired::Running));
    for try_ in 0..2 {
        while !world.waiting.iter().any(|effect| matches!(effect, Effect::StartVm { .. })) {
            if world.waiting.is_empty() {
                world.now = world.core.next_deadline().unwrap();
                world.input(Input::Tick);
            }
            world.answer(0, true);
        }
        world.now = world.core.next_deadline().unwrap();
        world.input(Input::Tick);
        let kill = world.find(|effect| matches!(effect, Effect::KillVm { .. }));
        world.answer(kill, true);
        assert!(try_ == 1 || world.core.next_deadline().is_some());
    }
    world.settle();
    assert_eq!(world.phase(1), Some(Phase::Failed));
    assert!(world.reason(1).contains("booting the VM took longer"), "{}", world.reason(1));
}

#[test]
fn a_guest_that_does_not_stop_is_killed() {
    let mut world = running();
    world.want(assignment(1, 1, 2, Desired::Stopped));
    world.waiting.retain(|effect| !matches!(effect, Effect::StopVm { .. }));
    world.settle();
    assert_eq!(world.phase(1), Some(Phase::Stopping));
    world.settle_with_time();
    assert_eq!(world.phase(1), Some(Phase::Stopped));
}

#[test]
fn a_restart_takes_up_what_lives_and_tells_what_ended() {
    let mut world = running();
    world.want(assignment(2, 1, 1, Desired::Running));
    world.settle();
    world.alive.remove(&id(2));
    world.restart();
    assert_eq!(world.core.observed(id(1)), None, "nothing is said before it is known");
    world.settle();
    assert_eq!(world.gates[&id(1)], Gate::Open { epoch: 1 });
    world.connect();
    world.want(assignment(1, 1, 1, Desired::Running));
    world.want(assignment(2, 1, 1, Desired::Running));
    world.bookmark();
    world.settle();
    assert_eq!((world.phase(1), world.phase(2)), (Some(Phase::Running), Some(Phase::Stopped)));
    assert!(world.alive.contains(&id(1)));
}

#[test]
fn a_stop_that_came_while_adopting_is_done_after_it() {
    let mut world = running();
    world.restart();
    world.connect();
    world.want(assignment(1, 1, 2, Desired::Stopped));
    world.bookmark();
    world.settle();
    assert_eq!(world.phase(1), Some(Phase::Stopped));
}

#[test]
fn a_higher_epoch_ends_the_streams_and_starts_anew_on_the_same_disk() {
    let mut world = running();
    world.want(assignment(1, 2, 2, Desired::Running));
    assert!(matches!(world.gates[&id(1)], Gate::Shut { .. }));
    world.settle();
    assert_eq!(world.gates[&id(1)], Gate::Open { epoch: 2 });
    assert_eq!(world.committed[&id(1)].epoch, 2);
}

#[test]
fn more_than_the_node_has_is_refused_with_the_numbers() {
    let mut world = World::new();
    world.connect();
    for n in 1..=5 {
        world.want(assignment(n, 1, 1, Desired::Running));
    }
    world.settle();
    assert_eq!(world.phase(4), Some(Phase::Running));
    assert_eq!(world.phase(5), Some(Phase::Failed));
    assert!(world.reason(5).contains("0 CPUs left of 8"), "{}", world.reason(5));
    assert_eq!(world.core.promised().memory_mib, 8192);
    world.want(assignment(1, 1, 2, Desired::Stopped));
    world.settle();
    world.want(assignment(5, 1, 2, Desired::Running));
    world.settle();
    assert_eq!(world.phase(5), Some(Phase::Running));
}

#[test]
fn a_removal_that_fails_is_tried_until_it_is_done() {
    let mut world = running();
    world.want(assignment(1, 1, 2, Desired::Deleted));
    for _ in 0..5 {
        let destroy = world.find(|effect| matches!(effect, Effect::Destroy { .. }));
        world.answer(destroy, false);
        world.now = world.core.next_deadline().unwrap();
        world.input(Input::Tick);
    }
    world.settle();
    assert_eq!(world.phase(1), Some(Phase::Gone));
}

#[test]
fn a_notice_is_told_while_it_runs_and_changes_nothing_else() {
    let mut world = running();
    let run = world.core.run(id(1)).unwrap();
    let before = world.committed[&id(1)].clone();
    let notice = |run, text: &str| Input::GuestNotice { sandbox: id(1), run, text: text.into() };
    world.input(notice(run, "/lib/a changed"));
    world.input(notice(run, "/lib/b changed"));
    world.input(notice(run, "/lib/c changed"));
    world.settle();
    let told = world.committed[&id(1)].clone();
    assert_eq!(told.reason, "/lib/c changed", "the newest");
    assert_eq!(towline_proto::v1::Observed { reason: String::new(), ..told }, before);
    // Said of what was stopped since, and of an older run: history.
    world.want(assignment(1, 1, 2, Desired::Stopped));
    world.settle();
    world.input(notice(run, "/lib/d changed"));
    world.settle();
    assert_eq!((world.phase(1), world.reason(1)), (Some(Phase::Stopped), "stopped"));
    world.want(assignment(1, 1, 3, Desired::Running));
    world.settle();
    world.input(notice(run, "/lib/d changed"));
    world.settle();
    assert_eq!((world.phase(1), world.reason(1)), (Some(Phase::Running), ""));
}

#[test]
fn a_notice_that_comes_before_it_runs_is_not_lost() {
    let mut world = running();
    world.restart();
    world.connect();
    let run = world.core.run(id(1)).unwrap();
    world.input(Input::GuestNotice { sandbox: id(1), run, text: "/lib/a changed".into() });
    world.want(assignment(1, 1, 1, Desired::Running));
    world.settle();
    assert_eq!((world.phase(1), world.reason(1)), (Some(Phase::Running), "/lib/a changed"));
}

#[test]
fn the_end_of_the_main_command_is_kept_over_a_restart() {
    let mut world = running();
    let run = world.core.run(id(1)).unwrap();
    let status = towline_proto::v1::ExitStatus {
        how: Some(exit_status::How::Code(7)),
        ..Default::default()
    };
    world.input(Input::MainExited { sandbox: id(1), run, status: status.clone() });
    world.settle();
    world.restart();
    world.committed.clear();
    world.connect();
    world.want(assignment(1, 1, 1, Desired::Running));
    world.settle();
    assert_eq!(world.committed[&id(1)].main_exit, Some(status));
}

/// Takes the first waiting effect that this likes, and answers it well.
fn answer(world: &mut World, likes: impl Fn(&Effect) -> bool) {
    let index = world.find(likes);
    world.answer(index, true);
}

#[test]
fn a_pause_keeps_streams_lets_no_new_ones_in_and_a_resume_goes_on() {
    let mut world = running();
    let run = world.core.run(id(1));
    world.want(assignment(1, 1, 2, Desired::Paused));
    assert!(matches!(&world.gates[&id(1)], Gate::Closing { reason } if reason.contains("paused")));
    // Nothing is said before it is so.
    assert_eq!(world.core.observed(id(1)), None);
    world.settle();
    assert_eq!((world.phase(1), world.halted.contains(&id(1))), (Some(Phase::Paused), true));
    world.want(assignment(1, 1, 3, Desired::Running));
    assert!(matches!(world.gates[&id(1)], Gate::Closing { .. }), "not while it is halted");
    world.settle();
    assert_eq!((world.phase(1), world.halted.contains(&id(1))), (Some(Phase::Running), false));
    assert_eq!(world.gates[&id(1)], Gate::Open { epoch: 1 });
    assert_eq!(world.core.run(id(1)), run, "it is still the first start");
}

#[test]
fn what_is_wanted_while_it_is_being_paused_is_done_after_it() {
    for (desired, phase) in [(Desired::Running, Phase::Running), (Desired::Stopped, Phase::Stopped)]
    {
        let mut world = running();
        world.want(assignment(1, 1, 2, Desired::Paused));
        world.want(assignment(1, 1, 3, desired));
        world.settle();
        assert_eq!(world.phase(1), Some(phase));
        assert!(world.halted.is_empty());
    }
    // A pause that comes before it is up.
    let mut world = World::new();
    world.connect();
    world.want(assignment(1, 1, 1, Desired::Running));
    world.want(assignment(1, 1, 2, Desired::Paused));
    world.settle();
    assert_eq!(world.phase(1), Some(Phase::Paused));
}

#[test]
fn a_paused_sandbox_is_stopped_by_letting_it_end_in_order() {
    let mut world = running();
    world.want(assignment(1, 1, 2, Desired::Paused));
    world.settle();
    world.want(assignment(1, 1, 3, Desired::Stopped));
    answer(&mut world, |effect| matches!(effect, Effect::ResumeVm { .. }));
    world.find(|effect| matches!(effect, Effect::StopVm { .. }));
    world.settle();
    assert_eq!(world.phase(1), Some(Phase::Stopped));
}

#[test]
fn a_pause_that_fails_or_takes_too_long_leaves_it_running_and_says_why() {
    let mut world = running();
    world.want(assignment(1, 1, 2, Desired::Paused));
    let pause = world.find(|effect| matches!(effect, Effect::PauseVm { .. }));
    world.answer(pause, false);
    world.settle();
    assert_eq!(world.phase(1), Some(Phase::Running));
    assert!(world.reason(1).contains("could not be paused: busy"), "{}", world.reason(1));
    assert_eq!(world.gates[&id(1)], Gate::Open { epoch: 1 });

    world.want(assignment(1, 1, 3, Desired::Running));
    world.want(assignment(1, 1, 4, Desired::Paused));
    world.waiting.retain(|effect| !matches!(effect, Effect::PauseVm { .. }));
    world.settle_with_time();
    assert_eq!(world.phase(1), Some(Phase::Running));
    assert!(world.reason(1).contains("took longer than 60 s"), "{}", world.reason(1));
}

#[test]
fn a_paused_sandbox_is_found_paused_after_a_restart_and_its_end_is_seen() {
    let mut world = running();
    world.want(assignment(1, 1, 2, Desired::Paused));
    world.settle();
    world.restart();
    world.connect();
    world.settle();
    assert_eq!((world.phase(1), world.halted.contains(&id(1))), (Some(Phase::Paused), true));
    let run = world.core.run(id(1)).unwrap();
    world.alive.clear();
    world.input(Input::VmExited { sandbox: id(1), run, reason: "killed".into() });
    world.settle();
    assert_eq!((world.phase(1), world.reason(1)), (Some(Phase::Stopped), "killed"));
}

#[test]
fn what_was_saved_for_copies_is_kept_until_the_last_one_is_up() {
    let mut world = World::new();
    world.connect();
    world.bookmark();
    assert_eq!(world.forks, Some(BTreeSet::new()), "what an earlier one left goes");
    world.want(copy(1, 1, 1, Desired::Running));
    world.want(Assignment {
        fork: copy(1, 1, 1, Desired::Running).fork,
        ..assignment(2, 1, 1, Desired::Running)
    });
    let fork = copy(1, 1, 1, Desired::Running).fork.unwrap().id;
    assert_eq!(world.forks, Some(BTreeSet::from([fork])));
    // The second one does not come up at first.
    while let Some(index) = world.waiting.iter().position(|effect| {
        !matches!(effect, Effect::StartVm { assignment, .. } if assignment.sandbox == id(2))
    }) {
        world.answer(index, true);
    }
    assert_eq!((world.phase(1), world.forks.clone()), (Some(Phase::Running), Some([fork].into())));
    world.answer(0, false);
    assert_eq!(world.forks, Some([fork].into()), "it is tried again");
    world.settle_with_time();
    assert_eq!((world.phase(2), world.forks.clone()), (Some(Phase::Running), Some([].into())));
    // A later start is a usual one.
    world.want(assignment(1, 1, 2, Desired::Stopped));
    world.settle();
    world.want(copy(1, 1, 3, Desired::Running));
    let Effect::Persist { record, .. } =
        &world.waiting[world.find(|effect| matches!(effect, Effect::Persist { .. }))]
    else {
        unreachable!()
    };
    assert_eq!(record.assignment.copies(), None);
}

#[test]
fn a_copy_that_may_not_know_that_it_is_one_is_ended_and_made_again() {
    let mut world = World::new();
    world.connect();
    world.want(copy(1, 1, 1, Desired::Running));
    answer(&mut world, |effect| matches!(effect, Effect::Persist { .. }));
    answer(&mut world, |effect| matches!(effect, Effect::Prepare { .. }));
    // Its VM lives, and the node agent dies before it has heard so.
    world.alive.insert(id(1));
    world.restart();
    world.find(|effect| matches!(effect, Effect::KillVm { .. }));
    assert!(!world.gates.contains_key(&id(1)), "nobody is let in");
    world.connect();
    world.settle_with_time();
    assert_eq!(world.phase(1), Some(Phase::Running));
    let again = world.core.run(id(1)).unwrap();
    assert!(again > 1);
}

#[test]
fn a_copy_that_failed_for_good_is_not_made_of_another_moment() {
    let mut world = World::new();
    world.connect();
    world.bookmark();
    world.want(copy(1, 1, 1, Desired::Running));
    answer(&mut world, |effect| matches!(effect, Effect::Persist { .. }));
    let Effect::Prepare { run, .. } =
        world.waiting.remove(world.find(|effect| matches!(effect, Effect::Prepare { .. })))
    else {
        unreachable!()
    };
    let failure = Failure { reason: "its source is gone".into(), transient: false };
    world.input(Input::PrepareFailed { sandbox: id(1), run, failure });
    world.settle();
    assert_eq!((world.phase(1), world.forks.clone()), (Some(Phase::Failed), Some([].into())));
    world.want(copy(1, 1, 2, Desired::Running));
    world.settle();
    assert_eq!(world.phase(1), Some(Phase::Failed));
    assert!(world.reason(1).contains("fork again"), "{}", world.reason(1));
}
