//! Sequences of an engine as values: opened on what is known of a prompt, fed piece by piece, parked in
//! RAM, closed. Several may be open; each is as if it were alone.

use super::experts::ExpertManager;
use super::{Engine, EngineError, Result, all_logits, check_ids};
use crate::backend::{
    LogitRows, NextLogits, OnRouting, Piece, Routing, RunEvents, SequenceId, SlotChange, Snapshot,
    Wanted,
};
use crate::planning::Offer;

/// A token that was chosen for a session, and what is wanted of the one after it.
#[derive(Debug)]
pub struct NextToken<'a> {
    pub session: &'a mut Session,
    pub id: u32,
    /// How many best logits are enough; all are needed if `None`
    pub wanted: Option<usize>,
}

/// Receives what the router chose for each of several tokens: token, layer, position, the choice.
pub type OnRoutings<'a> = dyn FnMut(usize, usize, usize, &Routing) + 'a;

/// One sequence: where it is, and what it has seen.
#[derive(Debug)]
pub struct Session {
    place: Place,
    tokens: Vec<u32>,
    /// Whether what it has seen is kept for others, and for whom
    salt: Option<u64>,
    /// Places in its prompt where a snapshot is taken, ascending
    marks: Vec<usize>,
}

/// A prompt that is in, and not yet kept.
#[derive(Debug)]
pub(super) struct PromptIn {
    id: SequenceId,
    salt: u64,
    tokens: Vec<u32>,
}

#[derive(Debug)]
enum Place {
    Resident(SequenceId),
    /// In RAM
    Parked(Snapshot),
}

impl Session {
    /// The ids it was fed, in order.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Whether it can run now.
    pub fn is_resident(&self) -> bool {
        matches!(self.place, Place::Resident(_))
    }

    /// The end of the next piece of `prompt`: pieces end at multiples of `chunk`, counted from the
    /// sequence's beginning, so that they are the same whatever was known of the prompt; and at marks.
    fn piece_end(&self, prompt: &[u32], chunk: usize) -> usize {
        let start = self.tokens.len();
        let on_grid = (start / chunk + 1) * chunk;
        let mark = self.marks.iter().copied().find(|&mark| mark > start);
        on_grid.min(prompt.len()).min(mark.unwrap_or(usize::MAX))
    }
}

impl Engine {
    /// Makes room for `sequences` at once, of `max_tokens` each; sessions that are open are lost, what is
    /// kept of them is not.
    ///
    /// # Errors
    /// A context above the model's; if memory is short.
    pub fn reserve(&mut self, sequences: usize, max_tokens: usize) -> Result<()> {
        let limit = self.config.max_position_embeddings;
        if max_tokens > limit {
            return Err(EngineError::Context {
                asked: max_tokens,
                limit,
            });
        }
        self.keep_prompt();
        self.own = None;
        Ok(self.executor.reserve(sequences, max_tokens)?)
    }

    /// Sessions that can run now, and how many can at once.
    pub fn resident_sessions(&self) -> (usize, usize) {
        self.executor.resident()
    }

    /// An empty session, of which nothing is kept.
    pub(super) fn new_session(&mut self) -> Result<Session> {
        Ok(Session {
            place: Place::Resident(self.executor.new_sequence()?),
            tokens: Vec::new(),
            salt: None,
            marks: Vec::new(),
        })
    }

    /// A session that has seen as much of `prompt` as is kept for `salt`, and never all of it: see
    /// [`Session::tokens`]. What it sees is kept in turn: where the prompt parts from earlier ones, at
    /// `marks`, at its end, and where the session is closed.
    ///
    /// # Errors
    /// [`BackendError::NoRoom`](crate::backend::BackendError::NoRoom) if as many are resident as were
    /// reserved: park or close one.
    pub fn open(&mut self, prompt: &[u32], marks: &[usize], salt: u64) -> Result<Session> {
        self.keep_prompt();
        let (resident, capacity) = self.executor.resident();
        if resident >= capacity {
            return Err(crate::backend::BackendError::NoRoom { capacity }.into());
        }
        // What an expert cache was told before the first sequence is about this one.
        if let (Some(experts), true) = (&mut self.experts, self.opened) {
            experts.begin_sequence();
        }
        self.opened = true;
        let mut session = match self.prefix.find(salt, prompt) {
            Some(snapshot) => Session {
                place: Place::Resident(self.executor.restore(&snapshot)?),
                tokens: prompt[..snapshot.tokens()].to_vec(),
                salt: None,
                marks: Vec::new(),
            },
            None => self.new_session()?,
        };
        session.salt = Some(salt);
        session.marks = marks.to_vec();
        session.marks.extend(self.prefix.branch_point(salt, prompt));
        session.marks.sort_unstable();
        Ok(session)
    }

    /// Feeds the next piece of `prompt`, which begins with what the session has seen; the logits of its
    /// last token, once that is in.
    ///
    /// # Errors
    /// An id outside the vocabulary, a full context, a failing backend, a session that is parked; a
    /// prompt that has nothing after what was seen.
    pub fn prefill_piece(
        &mut self,
        session: &mut Session,
        prompt: &[u32],
        on_routing: &mut OnRouting<'_>,
    ) -> Result<Option<Vec<f32>>> {
        let start = session.tokens.len();
        if prompt.len() <= start {
            return Err(EngineError::EmptyPrompt);
        }
        let chunk = self.executor.prefill_chunk(prompt.len());
        let end = session.piece_end(prompt, chunk);
        let last = end == prompt.len();
        let rows = match last {
            true => LogitRows::Last,
            false => LogitRows::None,
        };
        let admits = self
            .experts
            .as_ref()
            .is_some_and(ExpertManager::admits_prefill);
        let id = self.resident(session)?;
        let piece = Piece {
            admits: last && admits,
            ..Piece::new(id, &prompt[start..end], rows)
        };
        // No decode step even where a piece is one token.
        let logits = self.run_piece(session, piece, false, on_routing)?;
        if !last {
            if session.marks.contains(&end) {
                self.keep(session)?;
            }
            return Ok(None);
        }
        self.prompt_in = session.salt.map(|salt| PromptIn {
            id,
            salt,
            tokens: session.tokens.clone(),
        });
        self.prompt_ended()?;
        Ok(Some(all_logits(logits)))
    }

    /// Feeds a token that was chosen: the logits of the next one, all of them or, if only so many are
    /// `wanted`, the best where the backend finds them itself.
    ///
    /// # Errors
    /// As [`prefill_piece`](Engine::prefill_piece).
    pub fn decode(
        &mut self,
        session: &mut Session,
        id: u32,
        wanted: Option<usize>,
        on_routing: &mut OnRouting<'_>,
    ) -> Result<NextLogits> {
        let next = NextToken {
            session,
            id,
            wanted,
        };
        let mut outputs =
            self.decode_together(&mut [next], &mut |_, layer, position, routing| {
                on_routing(layer, position, routing);
            })?;
        Ok(outputs.remove(0))
    }

    /// Feeds a token to each of several sessions as one step: the logits of each one's next, in order, as
    /// [`decode`](Engine::decode) gives them. A backend reads weights once for all of them.
    ///
    /// # Errors
    /// As [`prefill_piece`](Engine::prefill_piece). Where the context of one is full, nothing was done; where
    /// the backend fails, all of these sessions are lost.
    pub fn decode_together(
        &mut self,
        tokens: &mut [NextToken<'_>],
        on_routings: &mut OnRoutings<'_>,
    ) -> Result<Vec<NextLogits>> {
        let ids: Vec<u32> = tokens.iter().map(|token| token.id).collect();
        check_ids(&ids, self.config.shape.vocab_size)?;
        self.keep_prompt();
        let piece = |(token, ids): (&NextToken<'_>, _)| {
            let piece = Piece::new(self.resident(token.session)?, ids, LogitRows::Last);
            Ok(match token.wanted {
                Some(wanted) => Piece {
                    wanted: Wanted::Best(wanted),
                    ..piece
                },
                None => piece,
            })
        };
        let pieces = tokens.iter().zip(ids.chunks(1)).map(piece);
        let pieces = pieces.collect::<Result<Vec<_>>>()?;
        let mut events = Events {
            experts: self.experts.as_mut(),
            decode: true,
            on_routings,
        };
        let outputs = self.executor.run(&pieces, &mut events)?;
        for token in tokens {
            token.session.tokens.push(token.id);
        }
        self.change_slots()?;
        Ok(outputs)
    }

    /// Feeds up to [`MOST_TENTATIVE`](crate::backend::executor::MOST_TENTATIVE) tokens in one step that may be
    /// taken back: the logits of the token after each, `[ids, vocab_size]`. They do not count until
    /// [`keep_tried`](Engine::keep_tried), which must come before anything else is fed.
    ///
    /// # Errors
    /// As [`decode`](Engine::decode); more tokens than that.
    pub fn try_tokens(
        &mut self,
        session: &mut Session,
        ids: &[u32],
        on_routing: &mut OnRouting<'_>,
    ) -> Result<Vec<f32>> {
        let piece = Piece::tentative(self.resident(session)?, ids);
        let seen = session.tokens.len();
        let logits = self.run_piece(session, piece, true, on_routing)?;
        session.tokens.truncate(seen);
        Ok(all_logits(logits))
    }

    /// Has these tokens count, the first ones of those that were tried.
    ///
    /// # Errors
    /// If they were not tried last; if the backend fails.
    pub fn keep_tried(&mut self, session: &mut Session, ids: &[u32]) -> Result<()> {
        let id = self.resident(session)?;
        self.executor.keep(id, ids.len())?;
        session.tokens.extend(ids);
        Ok(())
    }

    pub(super) fn resident(&self, session: &Session) -> Result<SequenceId> {
        match session.place {
            Place::Resident(id) => Ok(id),
            Place::Parked(_) => Err(EngineError::Parked),
        }
    }

    /// Runs a piece, and has the experts' cache see what the router picks. `decode`: it counts and
    /// moves, else it only learns.
    pub(super) fn run_piece(
        &mut self,
        session: &mut Session,
        piece: Piece<'_>,
        decode: bool,
        on_routing: &mut OnRouting<'_>,
    ) -> Result<NextLogits> {
        check_ids(piece.ids, self.config.shape.vocab_size)?;
        self.keep_prompt();
        let mut events = Events {
            experts: self.experts.as_mut(),
            decode,
            on_routings: &mut |_, layer, position, routing| on_routing(layer, position, routing),
        };
        let mut outputs = (self.executor).run(std::slice::from_ref(&piece), &mut events)?;
        session.tokens.extend(piece.ids);
        self.change_slots()?;
        Ok(outputs.remove(0))
    }

    /// Keeps the prompt that was fed last. It waits until anything else is asked of the engine, so that
    /// nobody waits for a first token while states are copied.
    fn keep_prompt(&mut self) {
        let Some(PromptIn { id, salt, tokens }) = self.prompt_in.take() else {
            return;
        };
        let is_there = self.executor.position(id).ok() == Some(tokens.len());
        if is_there && self.prefix.keeps() && !self.prefix.has(salt, &tokens) {
            // Without memory for it the next prompt is computed anew.
            if let Ok(snapshot) = self.executor.snapshot(id) {
                self.prefix.keep(salt, &tokens, snapshot);
            }
        }
    }

    /// Keeps what the session has seen, if any of it is kept.
    fn keep(&mut self, session: &Session) -> Result<()> {
        let (Some(salt), Place::Resident(id)) = (session.salt, &session.place) else {
            return Ok(());
        };
        if self.prefix.has(salt, &session.tokens) || !self.prefix.keeps() {
            return Ok(());
        }
        let snapshot = self.executor.snapshot(*id)?;
        self.prefix.keep(salt, &session.tokens, snapshot);
        Ok(())
    }

    /// Moves a session to RAM, where it waits; its place is free for another.
    ///
    /// # Errors
    /// If memory is short; the session is then still resident.
    pub fn park(&mut self, session: &mut Session) -> Result<()> {
        self.keep_prompt();
        if let Place::Resident(id) = session.place {
            session.place = Place::Parked(self.executor.park(id)?);
        }
        Ok(())
    }

    /// Brings a session back that was parked.
    ///
    /// # Errors
    /// [`BackendError::NoRoom`](crate::backend::BackendError::NoRoom).
    pub fn unpark(&mut self, session: &mut Session) -> Result<()> {
        if let Place::Parked(snapshot) = &session.place {
            session.place = Place::Resident(self.executor.restore(snapshot)?);
        }
        Ok(())
    }

    /// Ends a session; what it has seen is kept, also if it was given up half way.
    pub fn close(&mut self, session: Session) {
        self.keep_prompt();
        match &session.place {
            // A sequence that was lost with an error cannot be kept, nor one without memory for it:
            // its next prompt is computed anew.
            Place::Resident(id) => {
                let id = *id;
                if !session.tokens.is_empty() {
                    self.keep(&session).ok();
                }
                self.executor.drop_sequence(id);
            }
            Place::Parked(snapshot) => {
                if let (Some(salt), true) = (session.salt, self.prefix.keeps()) {
                    self.prefix.keep(salt, &session.tokens, snapshot.clone());
                }
            }
        }
    }
}

/// Passes on what the router picks, and lets the experts' cache see it first.
struct Events<'a, 'b> {
    experts: Option<&'a mut ExpertManager>,
    decode: bool,
    on_routings: &'a mut OnRoutings<'b>,
}

impl RunEvents for Events<'_, '_> {
    fn routed(&mut self, piece: usize, layer: usize, position: usize, routing: &Routing) {
        if let Some(experts) = &mut self.experts {
            experts.observe(layer, routing, self.decode);
        }
        (self.on_routings)(piece, layer, position, routing);
    }

    fn admit(&mut self, _piece: usize, layer: usize, offer: Offer<'_>) -> Vec<SlotChange> {
        match &mut self.experts {
            Some(experts) => experts.admit_prefill(layer, offer),
            None => Vec::new(),
        }
    }
}
