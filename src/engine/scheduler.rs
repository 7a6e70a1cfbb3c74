//! Which sequence runs next: fair between keys by the time they used, and within a key between its
//! requests. Pure: whoever runs something tells how long it took.
//!
//! A request takes turns: a piece of its prompt, or a slice of decode steps. Of all that wait, the one
//! whose key used the least time goes first, so a short request beside a prompt of 100k tokens waits
//! for one piece of that at most, and then runs until it has used as much time.

use std::collections::HashMap;

/// Decode steps of a turn: few, so that requests that decode side by side seem to run at once.
pub const SLICE_STEPS: usize = 4;

/// Names a request of a [`Scheduler`].
pub type TaskId = u64;

/// The time that keys and requests used.
#[derive(Debug, Default)]
pub struct Scheduler {
    tasks: HashMap<TaskId, Task>,
    keys: HashMap<u64, Key>,
    next_id: TaskId,
}

#[derive(Debug)]
struct Task {
    key: u64,
    used_s: f64,
}

#[derive(Debug)]
struct Key {
    tasks: usize,
    used_s: f64,
}

impl Scheduler {
    /// A request of `key` that begins now. It owes nothing for the time before it came, and is owed
    /// nothing.
    pub fn add(&mut self, key: u64) -> TaskId {
        let least = |all: &mut dyn Iterator<Item = f64>| all.reduce(f64::min).unwrap_or(0.0);
        let of_keys = least(&mut self.keys.values().map(|key| key.used_s));
        let own = self.tasks.values().filter(|task| task.key == key);
        let used_s = least(&mut own.map(|task| task.used_s));
        let entry = self.keys.entry(key).or_insert(Key {
            tasks: 0,
            used_s: of_keys,
        });
        entry.tasks += 1;
        let id = self.next_id;
        self.next_id += 1;
        self.tasks.insert(id, Task { key, used_s });
        id
    }

    /// The request has ended.
    pub fn remove(&mut self, id: TaskId) {
        let Some(task) = self.tasks.remove(&id) else {
            return;
        };
        if let Some(key) = self.keys.get_mut(&task.key) {
            key.tasks -= 1;
            if key.tasks == 0 {
                self.keys.remove(&task.key);
            }
        }
    }

    /// The request used `seconds` of the model.
    pub fn charge(&mut self, id: TaskId, seconds: f64) {
        let Some(task) = self.tasks.get_mut(&id) else {
            return;
        };
        task.used_s += seconds;
        if let Some(key) = self.keys.get_mut(&task.key) {
            key.used_s += seconds;
        }
    }

    /// Of `candidates`, the one whose turn it is.
    pub fn first_of(&self, candidates: impl Iterator<Item = TaskId>) -> Option<TaskId> {
        candidates.min_by(|&a, &b| self.order(a, b))
    }

    /// Of `candidates`, the one whose turn comes last: the one to be parked.
    pub fn last_of(&self, candidates: impl Iterator<Item = TaskId>) -> Option<TaskId> {
        candidates.max_by(|&a, &b| self.order(a, b))
    }

    /// By the time of the key, then of the request, then by age.
    fn order(&self, a: TaskId, b: TaskId) -> std::cmp::Ordering {
        let of = |id: TaskId| {
            let task = &self.tasks[&id];
            (self.keys[&task.key].used_s, task.used_s)
        };
        let (x, y) = (of(a), of(b));
        x.0.total_cmp(&y.0)
            .then(x.1.total_cmp(&y.1))
            .then(a.cmp(&b))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Who runs in `turns` turns, each of which takes what `seconds` says.
    fn run(
        scheduler: &mut Scheduler,
        turns: usize,
        seconds: impl Fn(TaskId) -> f64,
    ) -> Vec<TaskId> {
        let turn = |_| {
            let id = scheduler.first_of(scheduler.tasks.keys().copied()).unwrap();
            scheduler.charge(id, seconds(id));
            id
        };
        (0..turns).map(turn).collect()
    }

    #[test]
    fn requests_of_one_key_take_turns() {
        let mut scheduler = Scheduler::default();
        let [a, b, c] = [(); 3].map(|()| scheduler.add(7));
        assert_eq!(run(&mut scheduler, 6, |_| 1.0), [a, b, c, a, b, c]);
        scheduler.remove(b);
        assert_eq!(run(&mut scheduler, 3, |_| 1.0), [a, c, a]);
    }

    #[test]
    fn a_short_request_waits_for_one_piece_of_a_long_prompt() {
        let mut scheduler = Scheduler::default();
        let long = scheduler.add(1);
        run(&mut scheduler, 20, |_| 0.6);
        let short = scheduler.add(2);
        let seconds = |id| if id == long { 0.6 } else { 0.02 };
        let first = run(&mut scheduler, 2, seconds);
        assert!(first.contains(&short));
        let parked = scheduler.last_of([long, short].into_iter());
        assert_eq!(parked, Some(long));
        let turns = run(&mut scheduler, 30, seconds);
        let before_second_piece = turns.iter().take_while(|&&id| id == short).count();
        assert!(before_second_piece >= 28, "{turns:?}");
    }

    #[test]
    fn a_key_with_many_requests_gets_no_more_than_one_with_few() {
        let mut scheduler = Scheduler::default();
        let many: Vec<_> = (0..5).map(|_| scheduler.add(1)).collect();
        let one = scheduler.add(2);
        let turns = run(&mut scheduler, 20, |_| 1.0);
        assert_eq!(turns.iter().filter(|&&id| id == one).count(), 10);
        for id in many {
            assert_eq!(turns.iter().filter(|&&turn| turn == id).count(), 2);
            scheduler.remove(id);
        }
        scheduler.remove(one);
        assert!(scheduler.keys.is_empty());
    }

    #[test]
    fn whoever_comes_late_is_owed_nothing() {
        let mut scheduler = Scheduler::default();
        let first = scheduler.add(1);
        run(&mut scheduler, 100, |_| 1.0);
        let second = scheduler.add(2);
        let turns = run(&mut scheduler, 10, |_| 1.0);
        assert_eq!(turns.iter().filter(|&&id| id == first).count(), 5);
        assert_eq!(turns.iter().filter(|&&id| id == second).count(), 5);
    }
}
