// Load makes calls to a onetime server, as many callers at once as it is told, and tells in one JSON object how they
// went. The benchmarks run it: a client in Python is slower than the server, and would measure itself.
//
//	go run . -target 127.0.0.1:50051 -rpc health -callers 64 -seconds 10 -warmup 2
//	go run . -target 127.0.0.1:50051 -rpc prepare-links -count 100000 -callers 64 -output links
//	go run . -target 127.0.0.1:50051 -rpc consume-link -callers 64 -input links
//
// It owns the closed loop: each caller makes a call, waits for its end, and makes the next. It knows nothing of what a
// good figure is, and nothing of the database.
//
// It shares a machine with what it measures, so a call has to cost little: requests are put together from the few
// fields that they need, answers are not parsed, statistics are counters. Of a request's bytes none is ever used again
// for another: a call that was hung up or refused early may have ended before its bytes were sent, and writing over
// them would present one caller's secret twice and another's never.
package main

import (
	"bufio"
	"bytes"
	"context"
	cryptorand "crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"math/bits"
	"math/rand/v2"
	"net"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
)

const (
	issueToken        = "/onetime.v1.OneTimeTokenService/IssueToken"
	checkToken        = "/onetime.v1.OneTimeTokenService/CheckToken"
	consumeToken      = "/onetime.v1.OneTimeTokenService/ConsumeToken"
	startVerification = "/onetime.v1.EmailVerificationService/StartEmailVerification"
	verifyCode        = "/onetime.v1.EmailVerificationService/VerifyCode"
	getVerification   = "/onetime.v1.EmailVerificationService/GetEmailVerification"
	healthCheck       = "/grpc.health.v1.Health/Check"

	typeRecovery = 3 // TOKEN_TYPE_RECOVERY
	formatLink   = 1 // SECRET_FORMAT_LINK
	formatCode   = 2 // SECRET_FORMAT_CODE

	// connectTime is for a server that has a socket but is not yet ready, or speaks something else.
	connectTime = 10 * time.Second
	// grace is what calls get that are under way at the end. The server ends each within 5 s: what takes longer hangs.
	grace = 10 * time.Second
	// longestHangUp bounds the random time after which a call is hung up: from before the server has seen it to after
	// it has answered.
	longestHangUp = 5 * time.Millisecond
	// restWithoutServer keeps callers from spinning while there is no connection, when each call fails at once.
	restWithoutServer = 10 * time.Millisecond
)

// rpc is one kind of load.
type rpc struct {
	method string
	// words is how many words a line of the input has at least; 0 if there is no input.
	words int
	// cycles tells that the input starts afresh when it has been used up, since a call does not spend it.
	cycles bool
	// request makes the bytes of a call from a line of the input, if there is one.
	request func(c *caller, line []byte) []byte
	// line makes a line of the output from the answer, for what prepares the input of others.
	line func(c *caller, answer []byte) ([]byte, error)
}

var rpcs = map[string]rpc{
	"health": {method: healthCheck, request: func(*caller, []byte) []byte { return nil }},

	"issue-link": {method: issueToken, request: func(c *caller, _ []byte) []byte {
		return issueRequest(c, formatLink)
	}},
	"issue-link-id": {method: issueToken, request: func(c *caller, _ []byte) []byte {
		return appendBytes(issueRequest(c, formatLink), 7, c.uuid())
	}},
	"check-link":   {method: checkToken, words: 1, cycles: true, request: linkRequest},
	"consume-link": {method: consumeToken, words: 1, request: linkRequest},
	"consume-link-id": {method: consumeToken, words: 1, request: func(c *caller, line []byte) []byte {
		return appendBytes(linkRequest(c, line), 4, c.uuid())
	}},

	"check-code":   {method: checkToken, words: 2, cycles: true, request: codeRequest},
	"consume-code": {method: consumeToken, words: 2, request: codeRequest},

	"start-verification": {method: startVerification, request: startRequest},
	"verify-code":        {method: verifyCode, words: 2, request: verifyRequest},
	"verify-code-id": {method: verifyCode, words: 2, request: func(c *caller, line []byte) []byte {
		return appendBytes(verifyRequest(c, line), 3, c.uuid())
	}},
	"get-verification": {method: getVerification, words: 1, cycles: true, request: func(_ *caller, line []byte) []byte {
		token, _ := twoWords(line) // the code may follow it, so that verify-code's input serves here too
		return appendBytes(newRequest(), 2, token)
	}},

	"prepare-links": {
		method:  issueToken,
		request: func(c *caller, _ []byte) []byte { return issueRequest(c, formatLink) },
		line: func(_ *caller, answer []byte) ([]byte, error) {
			return bytesField(answer, 2)
		},
	},
	"prepare-codes": {
		method:  issueToken,
		request: func(c *caller, _ []byte) []byte { return issueRequest(c, formatCode) },
		line: func(c *caller, answer []byte) ([]byte, error) {
			code, err := bytesField(answer, 2)
			return joined(c.user, code), err
		},
	},
	"prepare-verifications": {
		method:  startVerification,
		request: startRequest,
		line: func(_ *caller, answer []byte) ([]byte, error) {
			token, err := bytesField(answer, 2)
			if err != nil {
				return nil, err
			}
			code, err := bytesField(answer, 3)
			return joined(token, code), err
		},
	},
}

// issueRequest asks for a token of a user who has none.
//
// Each address is another too: a million rows with one address would be a million entries in one bucket of the table's
// hash index, which no real table has.
func issueRequest(c *caller, format uint64) []byte {
	c.user = c.uuid()
	request := appendBytes(newRequest(), 1, c.user)
	request = appendNumber(request, 2, typeRecovery)
	request = appendBytes(request, 3, append(slices.Clone(c.user), "@example.com"...))
	return appendNumber(request, 4, format)
}

func linkRequest(_ *caller, line []byte) []byte {
	return appendBytes(appendNumber(newRequest(), 1, typeRecovery), 2, line)
}

func codeRequest(_ *caller, line []byte) []byte {
	user, code := twoWords(line)
	credential := appendBytes(appendBytes(make([]byte, 0, 64), 1, user), 3, code)
	return appendBytes(appendNumber(newRequest(), 1, typeRecovery), 3, credential)
}

func startRequest(c *caller, _ []byte) []byte {
	return appendBytes(appendBytes(newRequest(), 1, c.uuid()), 2, nil)
}

func verifyRequest(_ *caller, line []byte) []byte {
	token, code := twoWords(line)
	return appendBytes(appendBytes(newRequest(), 1, token), 2, code)
}

// newRequest has room for the longest request, which names an email verification's token.
func newRequest() []byte { return make([]byte, 0, 192) }

func appendBytes(message []byte, field protowire.Number, value []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(message, field, protowire.BytesType), value)
}

func appendNumber(message []byte, field protowire.Number, value uint64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(message, field, protowire.VarintType), value)
}

// bytesField returns a field of an answer; that it is missing or empty is an error.
func bytesField(message []byte, wanted protowire.Number) ([]byte, error) {
	var found []byte
	err := eachField(message, func(field protowire.Number, value []byte, _ uint64) {
		if field == wanted {
			found = value
		}
	})
	if err == nil && len(found) == 0 {
		err = fmt.Errorf("the answer has no field %d", wanted)
	}
	return found, err
}

// eachField calls visit for each field of a message: with its bytes, or with its number.
func eachField(message []byte, visit func(field protowire.Number, value []byte, number uint64)) error {
	for len(message) > 0 {
		field, kind, length := protowire.ConsumeTag(message)
		if length < 0 {
			return protowire.ParseError(length)
		}
		message = message[length:]
		var value []byte
		var number uint64
		switch kind {
		case protowire.BytesType:
			value, length = protowire.ConsumeBytes(message)
		case protowire.VarintType:
			number, length = protowire.ConsumeVarint(message)
		default:
			length = protowire.ConsumeFieldValue(field, kind, message)
		}
		if length < 0 {
			return protowire.ParseError(length)
		}
		visit(field, value, number)
		message = message[length:]
	}
	return nil
}

func twoWords(line []byte) (first, second []byte) {
	first, second, _ = bytes.Cut(line, []byte(" "))
	return first, second
}

func joined(first, second []byte) []byte {
	return slices.Concat(first, []byte(" "), second)
}

// rawCodec passes bytes through: a request is a []byte, an answer goes into an *answer.
type rawCodec struct{}

func (rawCodec) Marshal(request any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(request.([]byte))}, nil
}

func (rawCodec) Unmarshal(data mem.BufferSlice, into any) error {
	a := into.(*answer)
	a.length = data.Len()
	if a.keep {
		a.data = data.Materialize()
	}
	return nil
}

// Name is that of the codec that the server has.
func (rawCodec) Name() string { return "proto" }

type answer struct {
	keep   bool
	length int
	data   []byte
}

// input is the lines of a file, which callers take in turns.
//
// Where they begin is kept as numbers: a slice for each line would be a million pointers, which the garbage collector
// would walk again and again while the clock runs.
type input struct {
	data   []byte
	begins []int
	cycles bool
	taken  atomic.Int64
}

func readInput(path string, kind rpc, again bool) (*input, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	in := &input{data: data, cycles: kind.cycles || again}
	for begin := 0; begin < len(data); {
		end := bytes.IndexByte(data[begin:], '\n')
		if end < 0 {
			return nil, fmt.Errorf("%s: line %d does not end: the file is not whole", path, len(in.begins)+1)
		}
		// What is wrong is not shown, since it is a secret.
		if words := len(bytes.Fields(data[begin : begin+end])); words < kind.words || words > 2 {
			return nil, fmt.Errorf("%s: line %d has %d words, not %d", path, len(in.begins)+1, words, kind.words)
		}
		in.begins = append(in.begins, begin)
		begin += end + 1
	}
	if len(in.begins) == 0 {
		return nil, fmt.Errorf("%s is empty", path)
	}
	return in, nil
}

// take returns the next line, or false if all have been used.
func (in *input) take() ([]byte, bool) {
	index := int(in.taken.Add(1) - 1)
	if index >= len(in.begins) {
		if !in.cycles {
			return nil, false
		}
		index %= len(in.begins)
	}
	end := len(in.data)
	if index+1 < len(in.begins) {
		end = in.begins[index+1]
	}
	return in.data[in.begins[index] : end-1], true
}

// output is a file that lines are written to by all callers. It has secrets, so nobody else may read it.
type output struct {
	lock   sync.Mutex
	file   *os.File
	writer *bufio.Writer
}

func openOutput(path string) (*output, error) {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	if err := file.Chmod(0o600); err != nil { // it may have been there, open to all
		return nil, err
	}
	return &output{file: file, writer: bufio.NewWriterSize(file, 1<<16)}, nil
}

func (out *output) write(line []byte) error {
	out.lock.Lock()
	defer out.lock.Unlock()
	if _, err := out.writer.Write(line); err != nil {
		return err
	}
	return out.writer.WriteByte('\n')
}

func (out *output) close() error {
	return errors.Join(out.writer.Flush(), out.file.Close())
}

// histogram counts times in buckets whose width is under 1 % of their time, whatever that is, from 1 ns to 4 minutes.
// It does not grow with the length of a run.
type histogram struct {
	counts [4096]atomic.Uint64
	sum    atomic.Int64
	max    atomic.Int64
}

// precision is how many of a time's leading bits tell buckets apart.
const precision = 8

func (h *histogram) add(took time.Duration) {
	shift := max(0, bits.Len64(uint64(took))-precision)
	bucket := shift<<(precision-1) + int(took>>shift)
	h.counts[min(bucket, len(h.counts)-1)].Add(1)
	h.sum.Add(int64(took))
	for {
		known := h.max.Load()
		if int64(took) <= known || h.max.CompareAndSwap(known, int64(took)) {
			return
		}
	}
}

// summary has times in milliseconds; they are 0 if there were none.
type summary struct {
	Count uint64  `json:"count"`
	Mean  float64 `json:"mean"`
	P50   float64 `json:"p50"`
	P95   float64 `json:"p95"`
	P99   float64 `json:"p99"`
	Max   float64 `json:"max"`
}

func (h *histogram) summary() summary {
	var s summary
	for i := range h.counts {
		s.Count += h.counts[i].Load()
	}
	if s.Count == 0 {
		return s
	}
	s.Mean = milliseconds(float64(h.sum.Load()) / float64(s.Count))
	s.P50, s.P95, s.P99 = h.quantile(s.Count, 0.50), h.quantile(s.Count, 0.95), h.quantile(s.Count, 0.99)
	s.Max = milliseconds(float64(h.max.Load()))
	return s
}

func (h *histogram) quantile(count uint64, share float64) float64 {
	rank := uint64(math.Ceil(share * float64(count)))
	var seen uint64
	for bucket := range h.counts {
		if seen += h.counts[bucket].Load(); seen >= rank {
			shift := max(0, bucket>>(precision-1)-1)
			low := (bucket - shift<<(precision-1)) << shift
			middle := float64(low) + float64(int64(1)<<shift-1)/2
			return milliseconds(min(middle, float64(h.max.Load())))
		}
	}
	return milliseconds(float64(h.max.Load()))
}

func milliseconds(nanoseconds float64) float64 {
	return math.Round(nanoseconds/1e3) / 1e3
}

// statusNames has the names that the specification of gRPC uses; Go's library has its own.
var statusNames = [...]string{
	"OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
	"PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
	"INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
}

// tally counts how calls ended.
type tally struct {
	statuses  [len(statusNames)]atomic.Uint64
	refused   atomic.Uint64
	cancelled atomic.Uint64
	malformed atomic.Uint64
	lock      sync.Mutex
	reasons   map[string]uint64
}

// counts is a tally as it is printed.
type counts struct {
	OK uint64 `json:"ok"`
	// Statuses is how the calls ended. What was tried again because of -honour-retry is not among them.
	Statuses map[string]uint64 `json:"statuses"`
	// Reasons counts onetime-reason, of refusals that were tried again too.
	Reasons map[string]uint64 `json:"reasons"`
	// Refused counts RESOURCE_EXHAUSTED with RetryInfo.
	Refused uint64 `json:"refused"`
	// Cancelled counts calls that ended CANCELLED because of -cancel; others of it were quick enough.
	Cancelled uint64 `json:"cancelled"`
	// Malformed counts those of OK that lack the answer: an empty one, or of health another than SERVING.
	Malformed uint64 `json:"malformed"`
}

func (t *tally) counts() counts {
	t.lock.Lock()
	defer t.lock.Unlock()
	c := counts{
		OK:        t.statuses[codes.OK].Load(),
		Statuses:  map[string]uint64{},
		Reasons:   map[string]uint64{},
		Refused:   t.refused.Load(),
		Cancelled: t.cancelled.Load(),
		Malformed: t.malformed.Load(),
	}
	for code, name := range statusNames {
		if n := t.statuses[code].Load(); n > 0 {
			c.Statuses[name] = n
		}
	}
	for reason, n := range t.reasons {
		c.Reasons[reason] = n
	}
	return c
}

func (t *tally) add(o outcome) {
	if o.reason != "" {
		t.lock.Lock()
		t.reasons[o.reason]++
		t.lock.Unlock()
	}
	if o.refused {
		t.refused.Add(1)
	}
	if o.again {
		return
	}
	t.statuses[o.code].Add(1)
	if o.hungUp {
		t.cancelled.Add(1)
	}
	if o.malformed {
		t.malformed.Add(1)
	}
}

// outcome is how an attempt at a call ended.
type outcome struct {
	code      codes.Code
	reason    string
	wait      time.Duration // that RetryInfo asks for
	refused   bool
	again     bool // it was refused, and is to be tried again
	hungUp    bool // by us, before it ended
	malformed bool
}

type options struct {
	target      string
	rpc         string
	callers     int
	connections int
	seconds     float64
	warmup      float64
	count       int64
	input       string
	again       bool
	output      string
	progress    bool
	honourRetry bool
	cancel      float64
	seed        uint64
	procs       int
}

// run is the state that all callers share.
type run struct {
	options
	kind rpc
	in   *input  // nil if the kind has none
	out  *output // nil unless the kind prepares

	// from and to are the window in which calls are measured.
	from, to time.Time
	// stop ends with the window, or with a signal: no further calls are begun.
	stop context.Context
	// calls ends when calls that are under way are given up.
	calls context.Context

	all, measured tally
	latencies     histogram // of OK
	refusals      histogram
	late          atomic.Uint64 // calls that were under way when the window ended

	exhausted atomic.Bool
	prepared  atomic.Int64
	begun     atomic.Int64
	giveUp    context.CancelCauseFunc
}

// caller is one of the closed loops. It is used by one goroutine only.
type caller struct {
	run     *run
	conn    *grpc.ClientConn
	random  *rand.Rand
	user    []byte // of the last token that was asked for
	answer  answer
	trailer metadata.MD
	options []grpc.CallOption
}

func newCaller(r *run, conn *grpc.ClientConn, index int) *caller {
	var seed [32]byte
	binary.LittleEndian.PutUint64(seed[:], r.seed)
	binary.LittleEndian.PutUint64(seed[8:], uint64(index))
	c := &caller{run: r, conn: conn, random: rand.New(rand.NewChaCha8(seed))}
	c.answer.keep = r.out != nil || r.kind.method == healthCheck
	c.options = []grpc.CallOption{grpc.Trailer(&c.trailer)}
	return c
}

// uuid returns a random UUID, version 4.
func (c *caller) uuid() []byte {
	var id [16]byte
	binary.LittleEndian.PutUint64(id[:], c.random.Uint64())
	binary.LittleEndian.PutUint64(id[8:], c.random.Uint64())
	id[6] = id[6]&0x0f | 0x40
	id[8] = id[8]&0x3f | 0x80
	text := make([]byte, 36)
	hex.Encode(text, id[:4])
	text[8] = '-'
	hex.Encode(text[9:], id[4:6])
	text[13] = '-'
	hex.Encode(text[14:], id[6:8])
	text[18] = '-'
	hex.Encode(text[19:], id[8:10])
	text[23] = '-'
	hex.Encode(text[24:], id[10:])
	return text
}

// load makes calls until the end of the window, or of the input.
func (c *caller) load() {
	r := c.run
	for r.stop.Err() == nil && time.Now().Before(r.to) { // a context's end comes some calls late
		var line []byte
		if r.in != nil {
			var ok bool
			if line, ok = r.in.take(); !ok {
				r.exhausted.Store(true)
				return
			}
		}
		c.call(r.kind.request(c, line))
	}
}

// prepare makes calls until as many lines have been written as were asked for. A call that fails is made again, for
// another user; too many that fail end it all.
func (c *caller) prepare() {
	r := c.run
	for r.begun.Add(1) <= r.count {
		for {
			if r.stop.Err() != nil {
				return
			}
			o := c.call(r.kind.request(c, nil))
			if o.code != codes.OK {
				if failures := r.all.failures(); failures > 100+uint64(r.count)/100 {
					r.giveUp(fmt.Errorf("%d calls failed, the last with %s %s", failures, statusNames[o.code], o.reason))
				}
				continue
			}
			line, err := r.kind.line(c, c.answer.data)
			if err == nil {
				err = r.out.write(line)
			}
			if err != nil {
				r.giveUp(err)
				return
			}
			r.prepared.Add(1)
			break
		}
	}
}

// failures is the number of calls that ended otherwise than with OK.
func (t *tally) failures() uint64 {
	var sum uint64
	for code := 1; code < len(t.statuses); code++ {
		sum += t.statuses[code].Load()
	}
	return sum
}

// call makes a call, again and again as long as it is refused, if the refusals are honoured. It is the same request
// each time: one that was refused has spent nothing.
func (c *caller) call(request []byte) outcome {
	for {
		o := c.attempt(request)
		var wait time.Duration
		switch {
		case o.again:
			// Those who were refused together would otherwise come back together.
			wait = o.wait + time.Duration(0.1*c.random.Float64()*float64(o.wait))
		case o.code == codes.Unavailable && o.reason == "":
			wait = restWithoutServer
		}
		if wait > 0 {
			c.rest(wait)
		}
		if !o.again || c.run.stop.Err() != nil {
			return o
		}
	}
}

// rest waits, but not beyond the end.
func (c *caller) rest(wait time.Duration) {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-c.run.stop.Done():
	}
}

// attempt makes a call once, and counts it.
//
// Counts are of what ended within the window, whenever it began, and times of what began within it, whenever it ended:
// the one gives the true rate, and the other does not lose the calls that take longest.
func (c *caller) attempt(request []byte) outcome {
	r := c.run
	ctx := r.calls
	hangUp := r.cancel > 0 && c.random.Float64() < r.cancel
	c.trailer = nil
	c.answer.length, c.answer.data = 0, nil

	began := time.Now()
	if hangUp {
		var cancel context.CancelFunc
		ctx, cancel = context.WithCancel(ctx)
		defer cancel()
		// No deadline: the server would be told of that.
		defer time.AfterFunc(time.Duration(c.random.Float64()*float64(longestHangUp)), cancel).Stop()
	}
	err := c.conn.Invoke(ctx, r.kind.method, request, &c.answer, c.options...)
	ended := time.Now()

	o := c.outcome(err)
	o.hungUp = hangUp && o.code == codes.Canceled
	o.again = o.refused && r.honourRetry
	r.all.add(o)
	if !ended.Before(r.from) && ended.Before(r.to) {
		r.measured.add(o)
	}
	if !ended.Before(r.to) {
		r.late.Add(1)
	}
	// Of calls that were to be hung up, only the quick ones end with OK: they would make the others look better.
	if !began.Before(r.from) && !hangUp {
		switch {
		case o.code == codes.OK:
			r.latencies.add(ended.Sub(began))
		case o.refused:
			r.refusals.add(ended.Sub(began))
		}
	}
	return o
}

// serving is the answer of a server that is healthy: field 1 is SERVING.
var serving = []byte{1 << 3, 1}

func (c *caller) outcome(err error) outcome {
	if err == nil {
		malformed := c.answer.length == 0
		if c.run.kind.method == healthCheck {
			malformed = !bytes.Equal(c.answer.data, serving)
		}
		return outcome{malformed: malformed}
	}
	o := outcome{code: status.Code(err)}
	if int(o.code) >= len(statusNames) {
		o.code = codes.Unknown
	}
	if reason := c.trailer["onetime-reason"]; len(reason) > 0 {
		o.reason = reason[0]
	}
	if details := c.trailer["grpc-status-details-bin"]; o.code == codes.ResourceExhausted && len(details) > 0 {
		o.wait, o.refused = retryDelay([]byte(details[0]))
	}
	return o
}

// retryDelay finds the RetryInfo in a google.rpc.Status. It is read here because the library's way is by reflection,
// and an overloaded server refuses more calls than it serves.
func retryDelay(details []byte) (delay time.Duration, found bool) {
	_ = eachField(details, func(field protowire.Number, value []byte, _ uint64) {
		if field != 3 { // details, each a google.protobuf.Any
			return
		}
		typeURL, _ := bytesField(value, 1)
		if !bytes.HasSuffix(typeURL, []byte("/google.rpc.RetryInfo")) {
			return
		}
		found = true
		info, _ := bytesField(value, 2)
		duration, _ := bytesField(info, 1)
		_ = eachField(duration, func(field protowire.Number, _ []byte, number uint64) {
			switch field {
			case 1:
				delay += time.Duration(number) * time.Second
			case 2:
				delay += time.Duration(number)
			}
		})
	})
	return delay, found
}

// connect opens connections, and returns once each of them is ready.
func connect(target string, number int) ([]*grpc.ClientConn, error) {
	// The library would tell only that it is not ready, and not why.
	socket, err := net.DialTimeout("tcp", target, connectTime)
	if err != nil {
		return nil, fmt.Errorf("no server at %s: %w", target, err)
	}
	_ = socket.Close()

	ctx, cancel := context.WithTimeout(context.Background(), connectTime)
	defer cancel()
	conns := make([]*grpc.ClientConn, number)
	for i := range conns {
		conn, err := grpc.NewClient(
			"passthrough:///"+target,
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithDefaultCallOptions(grpc.ForceCodecV2(rawCodec{}), grpc.StaticMethod()),
			grpc.WithNoProxy(),
			// Nothing is tried again unseen; and what may be tried again is kept, which costs.
			grpc.WithDisableRetry(),
			grpc.WithDisableServiceConfig(),
			grpc.WithIdleTimeout(0),
			// A fixed window switches the estimation of the bandwidth off, which sends the server a ping with each
			// burst of answers.
			grpc.WithStaticStreamWindowSize(1<<20),
			grpc.WithStaticConnWindowSize(1<<20),
			// A server that was restarted under load is to be found again soon.
			grpc.WithConnectParams(grpc.ConnectParams{
				Backoff: backoff.Config{
					BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second,
				},
				MinConnectTimeout: 2 * time.Second,
			}),
		)
		if err != nil {
			return nil, err
		}
		conn.Connect()
		conns[i] = conn
	}
	for _, conn := range conns {
		for state := conn.GetState(); state != connectivity.Ready; state = conn.GetState() {
			if !conn.WaitForStateChange(ctx, state) {
				return nil, fmt.Errorf("what listens at %s does not speak gRPC in plain text", target)
			}
		}
	}
	return conns, nil
}

// result is what is printed. Its counts are of the window.
type result struct {
	RPC         string `json:"rpc"`
	Callers     int    `json:"callers"`
	Connections int    `json:"connections"`
	Seed        uint64 `json:"seed"`
	// Seconds is how long the window was.
	Seconds float64 `json:"seconds"`
	counts
	// Throughput is OK answers in a second.
	Throughput float64 `json:"throughput"`
	// Latency is of OK, each attempt for itself: what was waited before it because of -honour-retry is not in it.
	Latency        summary `json:"latency_ms"`
	RefusedLatency summary `json:"refused_latency_ms"`
	// Late is how many calls were under way when the window ended.
	Late uint64 `json:"late"`
	// Exhausted tells that the input was used up before the time was.
	Exhausted bool `json:"exhausted"`
	// Interrupted tells that a signal ended it before its time.
	Interrupted bool `json:"interrupted"`
	// Prepared is how many lines were written.
	Prepared int64 `json:"prepared,omitempty"`
	// Total is of everything, the warm-up and what was late included: what the server has counted.
	Total counts `json:"total"`
	// CPUSeconds is what this process itself used within the window; CPUShare is that by the second. Close to
	// GOMAXPROCS, it has measured itself.
	CPUSeconds float64 `json:"cpu_seconds"`
	CPUShare   float64 `json:"cpu_share"`
	GOMAXPROCS int     `json:"gomaxprocs"`
}

// cpu is the processor time, in seconds, that this process has used.
func cpu() float64 {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		return math.NaN()
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano()).Seconds()
}

// execute makes the calls, and returns how they went.
func execute(o options, kind rpc) (*result, error) {
	r := &run{options: o, kind: kind}
	r.all.reasons, r.measured.reasons = map[string]uint64{}, map[string]uint64{}
	var err error
	if kind.words > 0 {
		if r.in, err = readInput(o.input, kind, o.again); err != nil {
			return nil, err
		}
	}
	conns, err := connect(o.target, min(o.connections, o.callers))
	if err != nil {
		return nil, err
	}
	if kind.line != nil { // after the connection, so that a wrong target does not cost a file that was there
		if r.out, err = openOutput(o.output); err != nil {
			return nil, err
		}
	}

	interrupt, ignore := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer ignore()
	r.from = time.Now().Add(inSeconds(o.warmup))
	r.to = r.from.Add(inSeconds(o.seconds))
	limited, cancel := context.WithDeadline(interrupt, r.to)
	defer cancel()
	r.stop, r.giveUp = context.WithCancelCause(limited)
	defer r.giveUp(nil)
	calls, abandon := context.WithCancel(context.Background())
	defer abandon()
	r.calls = calls
	// Once no more calls are begun, those under way may end, but not hang for ever.
	context.AfterFunc(r.stop, func() {
		time.AfterFunc(grace, abandon)
	})

	var callers sync.WaitGroup
	for i := range o.callers {
		c := newCaller(r, conns[i%len(conns)], i)
		if r.out != nil {
			callers.Go(c.prepare)
		} else {
			callers.Go(c.load)
		}
	}
	done := make(chan struct{})
	go func() {
		callers.Wait()
		close(done)
	}()
	var reporter sync.WaitGroup
	if o.progress || r.out != nil {
		reporter.Go(func() { r.report(done) })
	}

	until(r.from, done)
	cpuFrom := cpu()
	until(r.to, done)
	cpuTo := cpu()
	seconds := min(max(0, time.Since(r.from).Seconds()), o.seconds)
	<-done
	reporter.Wait()

	for _, conn := range conns {
		_ = conn.Close()
	}
	if r.out != nil {
		if err := r.out.close(); err != nil {
			return nil, err
		}
	}
	if cause := context.Cause(r.stop); cause != nil && !errors.Is(cause, context.DeadlineExceeded) &&
		interrupt.Err() == nil {
		return nil, cause
	}
	if calls.Err() != nil {
		fmt.Fprintf(os.Stderr, "load: calls were given up that hung for %s after the end\n", grace)
	}
	res := &result{
		RPC:            o.rpc,
		Callers:        o.callers,
		Connections:    len(conns),
		Seed:           o.seed,
		Seconds:        seconds,
		counts:         r.measured.counts(),
		Latency:        r.latencies.summary(),
		RefusedLatency: r.refusals.summary(),
		Late:           r.late.Load(),
		Exhausted:      r.exhausted.Load(),
		Interrupted:    interrupt.Err() != nil,
		Prepared:       r.prepared.Load(),
		Total:          r.all.counts(),
		CPUSeconds:     cpuTo - cpuFrom,
		GOMAXPROCS:     runtime.GOMAXPROCS(0),
	}
	if seconds > 0 {
		res.Throughput = float64(res.OK) / seconds
		res.CPUShare = res.CPUSeconds / seconds
	}
	return res, nil
}

func inSeconds(seconds float64) time.Duration {
	return time.Duration(seconds * float64(time.Second))
}

// until waits for a time, or for the end of it all.
func until(moment time.Time, done <-chan struct{}) {
	select {
	case <-time.After(time.Until(moment)):
	case <-done:
	}
}

// report tells each second how it goes, and in the end how it went.
func (r *run) report(done <-chan struct{}) {
	began := time.Now()
	ticks := time.NewTicker(time.Second)
	defer ticks.Stop()
	var known uint64
	for ended := false; !ended; {
		select {
		case <-done:
			ended = true
		case <-ticks.C:
		}
		ok := r.all.statuses[codes.OK].Load()
		line := fmt.Sprintf("%4.0f s  %7d OK/s  %9d OK  %7d failed  %7d refused", time.Since(began).Seconds(),
			ok-known, ok, r.all.failures(), r.all.refused.Load())
		if r.out != nil {
			line += fmt.Sprintf("  %5.1f %%", 100*float64(r.prepared.Load())/float64(r.count))
		}
		fmt.Fprintln(os.Stderr, line)
		known = ok
	}
}

// parse reads the command line; what is wrong in it is all told at once.
func parse() (options, rpc) {
	var o options
	names := make([]string, 0, len(rpcs))
	for name := range rpcs {
		names = append(names, name)
	}
	slices.Sort(names)
	flag.StringVar(&o.target, "target", "127.0.0.1:50051", "`host:port` of the server, which serves in plain text")
	flag.StringVar(&o.rpc, "rpc", "health", "what to call: "+strings.Join(names, ", "))
	flag.IntVar(&o.callers, "callers", 64, "how many call at once")
	flag.IntVar(&o.connections, "connections", 4, "connections that they share")
	flag.Float64Var(&o.seconds, "seconds", 10, "how long to measure")
	flag.Float64Var(&o.warmup, "warmup", 0, "seconds of calls before that")
	flag.StringVar(&o.input, "input", "", "`file` of what to present, a line each: a secret (check-link, consume-link), "+
		"\"user code\" (check-code, consume-code), \"token code\" (verify-code), a token (get-verification); the same "+
		"where a name ends in -id, whose calls have a request_id")
	flag.BoolVar(&o.again, "again", false,
		"start the input afresh when it has been used up, though calls spend it: for a server that spends nothing")
	flag.Int64Var(&o.count, "count", 1000, "how many lines prepare-* writes")
	flag.StringVar(&o.output, "output", "", "`file` that prepare-* writes; it has secrets")
	flag.BoolVar(&o.progress, "progress", false, "tell on stderr how it goes; prepare-* always does")
	flag.BoolVar(&o.honourRetry, "honour-retry", false,
		"after RESOURCE_EXHAUSTED with RetryInfo, wait as told and try again; prepare-* always does")
	flag.Float64Var(&o.cancel, "cancel", 0, "`share` of calls, 0 to 1, that are hung up after up to 5 ms")
	flag.Uint64Var(&o.seed, "seed", 0,
		"makes users and ids; with the same seed and callers they are the same, and no longer new; 0 is a random one")
	flag.IntVar(&o.procs, "procs", 0, "GOMAXPROCS; 1 if neither this nor the variable is set")
	flag.Parse()

	var wrong []string
	check := func(right bool, message string) {
		if !right {
			wrong = append(wrong, message)
		}
	}
	kind, known := rpcs[o.rpc]
	check(known, "-rpc is one of "+strings.Join(names, ", "))
	check(flag.NArg() == 0, "there are no arguments beside the flags")
	check(o.callers >= 1, "-callers is at least 1")
	check(o.connections >= 1, "-connections is at least 1")
	check(o.seconds > 0, "-seconds is more than 0")
	check(o.warmup >= 0, "-warmup is 0 or more")
	check(o.count >= 1, "-count is at least 1")
	check(o.cancel >= 0 && o.cancel <= 1, "-cancel is from 0 to 1")
	check(o.procs >= 0, "-procs is at least 1")
	check((kind.words > 0) == (o.input != ""), "-input goes with check-*, consume-*, verify-code and get-verification")
	check((kind.line != nil) == (o.output != ""), "-output goes with prepare-*")
	if len(wrong) > 0 {
		for _, message := range wrong {
			fmt.Fprintln(os.Stderr, "load: "+message)
		}
		os.Exit(2)
	}
	if kind.line != nil {
		// It has no time: it ends when all is written. A call that was hung up would leave a row that no line names.
		o.warmup, o.seconds, o.cancel, o.honourRetry = 0, (24 * 365 * time.Hour).Seconds(), 0, true
	}
	if o.seed == 0 {
		var seed [8]byte
		_, _ = cryptorand.Read(seed[:])                    // it never fails
		o.seed = binary.LittleEndian.Uint64(seed[:]) >> 11 // a number that JSON keeps
	}
	return o, kind
}

func main() {
	o, kind := parse()
	// One processor is enough for far more calls than the server can answer, and leaves it the others; idle threads of
	// more would spin in search of work.
	if o.procs > 0 || os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(max(1, o.procs))
	}
	// There is little on the heap, and memory is cheaper here than processor time.
	debug.SetGCPercent(800)
	res, err := execute(o, kind)
	if err == nil {
		err = writeResult(os.Stdout, res)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "load: "+err.Error())
		os.Exit(1)
	}
}

func writeResult(to io.Writer, res *result) error {
	encoder := json.NewEncoder(to)
	encoder.SetIndent("", "  ")
	return encoder.Encode(res)
}
