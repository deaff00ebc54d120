//! What strangers send, and peers that mean harm: nothing of it may reach a panic, and each gets an error.

use std::cell::{Cell, OnceCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use servicekeel_core::flow::frame::{Open, Preface, Refused, decode_payload};
use servicekeel_core::mesh::LinkMessage;
use tokio::io::{DuplexStream, duplex};
use tokio::time::timeout;

use super::*;

/// Numbers that look drawn, the same ones each time.
struct Draw(u64);

impl Draw {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.next() as u8).collect()
    }

    /// A few bytes changed, some lost, or some put in.
    fn mutate(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut mutated = bytes.to_vec();
        for _ in 0..=self.below(3) {
            let at = self.below(mutated.len().max(1));
            match self.below(4) {
                0 => mutated.truncate(at),
                1 => drop(mutated.splice(at..at, self.bytes(1 + at % 9))),
                _ if mutated.is_empty() => {}
                // Lengths stand in the first bytes.
                2 => mutated[at % 16.min(bytes.len())] = self.next() as u8,
                _ => mutated[at] ^= 1 << self.below(8),
            }
        }
        mutated
    }
}

/// Runs cases, and counts those that panic.
struct Trial {
    runtime: tokio::runtime::Runtime,
    panics: Cell<usize>,
    first: OnceCell<String>,
}

impl Trial {
    fn new() -> Self {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        Self { runtime, panics: Cell::new(0), first: OnceCell::new() }
    }

    fn run<T>(&self, case: impl FnOnce() -> String, future: impl Future<Output = T>) -> Option<T> {
        let outcome = catch_unwind(AssertUnwindSafe(|| self.runtime.block_on(future)));
        if outcome.is_err() {
            self.panics.set(self.panics.get() + 1);
            self.first.get_or_init(case);
        }
        outcome.ok()
    }

    fn end(self) {
        assert_eq!(self.panics.get(), 0, "panics, the first by {:?}", self.first.get());
    }
}

const ACCEPTS: bool = true;
const DIALS: bool = false;

/// A handshake with one who says `words`, so many bytes at a time, and what he hears.
fn hear_out(trial: &Trial, us: &Identity, accepts: bool, words: &[u8], step: usize) -> Vec<u8> {
    let case = || format!("accepts: {accepts}, {step} bytes at a time: {words:02x?}");
    let conversed = trial.run(case, async {
        let (near, mut far) = duplex(step);
        let (mut reading, mut writing) = tokio::io::split(&mut far);
        let mut heard = Vec::new();
        let ours = async {
            let pool = BufferPool::new();
            match accepts {
                true => accept(near, us.server(), pool).await.map(drop),
                false => connect(near, us.client(), pool).await.map(drop),
            }
        };
        let says = async {
            let _ = writing.write_all(words).await;
            let _ = writing.shutdown().await;
        };
        let (ours, (), _) = tokio::join!(ours, says, reading.read_to_end(&mut heard));
        (ours, heard)
    });
    let Some((ended, heard)) = conversed else { return Vec::new() };
    assert!(ended.is_err(), "{} is let in", case());
    heard
}

/// A record of the type handshake.
fn handshake_record(content: &[u8]) -> Vec<u8> {
    [&[22, 3, 1], &(content.len() as u16).to_be_bytes()[..], content].concat()
}

#[test]
fn rubbish_in_a_handshake() {
    let ((a, b), trial, mut draw) = (identities(), Trial::new(), Draw(1));
    // What each says first, as a real one does.
    let hello = hear_out(&trial, &a, DIALS, b"", 1 << 16);
    let answer = hear_out(&trial, &b, ACCEPTS, &hello, 1 << 16);
    assert!(hello.len() > 100 && answer.len() > 500, "{} {}", hello.len(), answer.len());
    for (us, accepts, real) in [(&b, ACCEPTS, &hello), (&a, DIALS, &answer)] {
        for _ in 0..1500 {
            // A record's header with random bytes in it, of the length that it says.
            let rubbish = handshake_record(&draw.bytes(512));
            hear_out(&trial, us, accepts, &rubbish, 1 << 16);
            // The same in two records, and messages of the lengths that they say.
            let n = draw.below(600);
            let (kind, length) = (draw.below(25) as u8, draw.next() as u16);
            let message = [&[kind, 0], &length.to_be_bytes()[..], &draw.bytes(n)].concat();
            let cut = draw.below(message.len());
            let two = [handshake_record(&message[..cut]), handshake_record(&message[cut..])].concat();
            hear_out(&trial, us, accepts, &two, 1 << 16);
            let n = draw.below(100);
            hear_out(&trial, us, accepts, &draw.bytes(n), 1 << 16);
            let mutated = draw.mutate(real);
            hear_out(&trial, us, accepts, &mutated, 1 << 16);
        }
        for torn in 0..real.len().min(700) {
            hear_out(&trial, us, accepts, &real[..torn], 1 << 16);
        }
        for step in 1..20 {
            hear_out(&trial, us, accepts, &handshake_record(&draw.bytes(512)), step);
        }
    }
    trial.end();
}

/// Both ends of a connection in memory, whose path changes, loses or adds bytes here and there.
#[test]
fn a_path_that_spoils_what_it_carries() {
    let ((a, b), trial, mut draw) = (identities(), Trial::new(), Draw(2));
    for number in 0..400 {
        let (near, mut from_near) = duplex(1 << 16);
        let (mut from_far, far) = duplex(1 << 16);
        let (spoiled, mut draw) = (draw.below(6), Draw(draw.next()));
        trial.run(|| format!("number {number}"), async {
            let dialled = async {
                let (mut channel, _) = connect(near, a.client(), BufferPool::new()).await?;
                channel.send_payload(Kind::Message, 0, &[7; 100]).unwrap();
                channel.flush().await.ok();
                Ok::<_, HandshakeError>(channel.recv().await.is_ok())
            };
            let accepted = async {
                let (mut channel, _) = accept(far, b.server(), BufferPool::new()).await?;
                channel.send_payload(Kind::Message, 0, &[8; 100]).unwrap();
                channel.flush().await.ok();
                Ok::<_, HandshakeError>(channel.recv().await.is_ok())
            };
            let path = async move {
                let (mut count, mut there, mut back) = (0, Vec::new(), Vec::new());
                loop {
                    let (bytes, to) = tokio::select! {
                        biased;
                        n = from_near.read_buf(&mut there) => match n {
                            Ok(n) if n > 0 => (std::mem::take(&mut there), &mut from_far),
                            _ => return,
                        },
                        n = from_far.read_buf(&mut back) => match n {
                            Ok(n) if n > 0 => (std::mem::take(&mut back), &mut from_near),
                            _ => return,
                        },
                    };
                    let bytes = if count == spoiled { draw.mutate(&bytes) } else { bytes };
                    count += 1;
                    if to.write_all(&bytes).await.is_err() {
                        return;
                    }
                }
            };
            let _ =
                timeout(Duration::from_secs(60), Box::pin(async { tokio::join!(dialled, accepted, path) }))
                    .await;
        });
    }
    trial.end();
}

/// Two ends of a connection in memory.
async fn in_memory(a: &Identity, b: &Identity) -> (Channel<DuplexStream>, Channel<DuplexStream>) {
    let (near, far) = duplex(1 << 18);
    let (dialled, accepted) = tokio::join!(
        connect(near, a.client(), BufferPool::new()),
        accept(far, b.server(), BufferPool::new()),
    );
    (dialled.unwrap().0, accepted.unwrap().0)
}

/// A peer that is known, and whose records hold anything.
#[test]
fn rubbish_behind_a_handshake() {
    let ((a, b), trial, mut draw) = (identities(), Trial::new(), Draw(3));
    let (mut refused, mut taken) = (0, 0);
    for number in 0..300 {
        let ended = trial.run(|| format!("number {number}"), async {
            let (mut rogue, mut ours) = in_memory(&a, &b).await;
            for _ in 0..20 {
                let n = draw.below(300);
                match draw.below(8) {
                    0 => rogue.put_raw(&draw.bytes(n)),
                    1 => rogue.put_raw(&[&[23, 3, 3, 0, n as u8], &draw.bytes(n)[..]].concat()),
                    kind @ 2..4 => rogue.put_sealed([0, 20, 21, 22][kind], &draw.bytes(n % 8)),
                    4 => rogue.put_sealed(23, &draw.bytes(n)),
                    _ => {
                        // A frame's header, and what its payload may be.
                        let header = [1 + draw.below(12) as u8, 0, 0, n as u8];
                        let offset = draw.next().to_be_bytes();
                        rogue.put_sealed(23, &[&header, &offset[..], &draw.bytes(n % 256)].concat());
                    }
                }
            }
            let _ = timeout(Duration::from_secs(1), rogue.flush()).await;
            drop(rogue);
            loop {
                match ours.recv().await {
                    Ok(Some(_)) => taken += 1,
                    Ok(None) => return false,
                    Err(_) => return true,
                }
            }
        });
        refused += usize::from(ended == Some(true));
    }
    assert!(refused > 200 && taken > 50, "{refused} refused, {taken} frames taken");
    trial.end();
}

#[test]
fn rubbish_in_a_payload() {
    let (trial, mut draw) = (Trial::new(), Draw(4));
    let real = {
        let message = LinkMessage::DialBack { flows: 3, datagrams: 1 };
        minicbor::to_vec(&message).unwrap()
    };
    for _ in 0..20_000 {
        let n = draw.below(60);
        let bytes = if draw.below(2) == 0 { draw.bytes(n) } else { draw.mutate(&real) };
        trial.run(|| format!("{bytes:02x?}"), async {
            let _ = decode_payload::<Preface>(&bytes);
            let _ = decode_payload::<LinkMessage>(&bytes);
            let _ = decode_payload::<Open>(&bytes);
            let _ = decode_payload::<Refused>(&bytes);
        });
    }
    trial.end();
}

/// RFC 8446 §4.6.3 bounds neither how often keys are updated nor how often that is asked for.
#[test]
fn a_peer_that_does_nothing_but_update_its_keys() {
    let ((a, b), trial) = (identities(), Trial::new());
    for wanted in [0, 1] {
        let updates = trial.run(String::new, async {
            let (mut rogue, mut ours) = in_memory(&a, &b).await;
            for _ in 0..1000 {
                rogue.put_key_update(wanted);
            }
            rogue.flush().await.unwrap();
            let error = timeout(Duration::from_secs(1), ours.recv()).await.expect("an end").unwrap_err();
            assert!(error.to_string().contains("key updates"), "{error}");
            ours.key_updates()
        });
        assert!(updates.unwrap() <= 64, "{updates:?}");
    }
    // What comes between them makes them honest; one answer goes for all that were asked for meanwhile.
    trial.run(String::new, async {
        let (mut rogue, mut ours) = in_memory(&a, &b).await;
        for _ in 0..100 {
            for _ in 0..10 {
                rogue.put_key_update(1);
            }
            rogue.send_payload(Kind::Message, 0, b"x").unwrap();
        }
        rogue.flush().await.unwrap();
        for _ in 0..100 {
            assert_eq!(ours.recv().await.unwrap().unwrap().1, b"x");
        }
        assert!(ours.key_updates() < 1000 + 10, "{}", ours.key_updates());
        ours.send_payload(Kind::Message, 0, b"y").unwrap();
        ours.flush().await.unwrap();
        assert_eq!(rogue.recv().await.unwrap().unwrap().1, b"y");
    });
    trial.end();
}
